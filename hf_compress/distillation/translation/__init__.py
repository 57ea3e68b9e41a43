"""A teacher that has another tokenizer than its student: the same text, in tokens of both."""
