"""From the data sets that a recipe names to token ids on disk: messages, text, tokens.

Of the model it needs the tokenizer only; may touch model and the wings before it.
"""
