"""A Sampler and its Dialect as an OpenAI-compatible endpoint; whose policy it is, and who trains it, is not known here."""
