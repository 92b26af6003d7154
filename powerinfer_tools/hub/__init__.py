"""Models of the Hugging Face hub: fetched into its cache, listed and removed there.

Nothing here touches the network but :mod:`.pulling`, and that only when it is called.
"""
