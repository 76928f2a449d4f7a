"""How converted models are saved in the formats of others, and read from them."""
