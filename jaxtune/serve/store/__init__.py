"""The database and the storage folder: what all processes of a service share."""
