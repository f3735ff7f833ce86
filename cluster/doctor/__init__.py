"""What `outlast doctor` looks at, one file per place, and what it makes of it.

Each place is first *looked at*, which gives facts, and then *judged*, which is pure: facts in, findings out. Nothing is
changed anywhere, and no question is asked whose answer a node would log.
"""
