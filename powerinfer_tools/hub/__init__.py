"""Models of the Hugging Face hub: fetched into its cache, listed and removed there.

Only :mod:`.pulling` uses the network, and only when it is called.
"""
