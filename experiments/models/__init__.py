"""Models and tokenizers: built or loaded, packed, adapted; text from them."""
