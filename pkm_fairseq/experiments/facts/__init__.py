"""Facts about synthetic people: how many of them a model stores and recalls."""
