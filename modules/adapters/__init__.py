"""Adapters: their settings, modules and initialisation; attach, switch, merge and detach them."""
