"""Every interleaving of a small world, walked to the end: see `world.py` for what the world is.

| file | idea |
|---|---|
| `world.py` | the states of the world, the steps between them, and what must hold in each |
| `explorer.py` | breadth first over all of it; shortest counterexamples; nothing stuck |
| `variants.py` | known-bad rules, which the explorer has to catch |
| `__main__.py` | `python -m tests.model` prints what was walked and what was caught |
"""
