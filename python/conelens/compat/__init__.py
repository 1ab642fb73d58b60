"""Doors for users of other tools, which need not be installed: the same call, answered by conelens."""
