"""How training frameworks are given an optimizer of this library: a module for each, over its public interface.

No framework is imported before a function that needs it is called.
"""
