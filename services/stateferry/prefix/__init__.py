"""What two prompts have in common: tokens as bytes, their hashes, a radix tree over them."""
