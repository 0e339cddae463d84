"""How training frameworks are given an optimizer of this library: a module for each, over its public interface.

``import asgo`` imports none of them; a module here needs its framework, with which ``pip install "asgo[NAME]"`` comes.
"""
