"""A smaller vocabulary: the embedding, the head and the tokenizer shrink together."""
