"""A text, or examples, in the context of the base becomes a prompt that the base answers alike with."""
