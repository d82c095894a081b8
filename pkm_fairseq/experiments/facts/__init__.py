"""Facts about people that never were: how many a model can store, and how it reads them back."""
