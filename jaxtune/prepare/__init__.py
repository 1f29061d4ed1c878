"""What a careful person does to data before training: look, clean, split, augment, report.

Rows stay what they are in the file, a mapping of columns; `rows.Table` knows which columns hold the text, the answer
and the label. A check is a pure function of a table, a proposal is a value, and `session` asks and writes.
"""
