"""From logits to text: generation and sampling."""
