"""Configs that ship with the zoo: each file defines `config` and says what it is for."""
