"""A fine-tuning service that OpenAI's client can talk to, and a page to look at.

Three kinds of processes share a database and a storage folder: the API (no JAX in it), workers, each of which starts
`jaxtune train` and reads the run folder that it writes, and the inference process that the API starts.
"""
