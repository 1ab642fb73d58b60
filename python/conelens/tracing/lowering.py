"""Every rule that turns one torch call into operators of the graph, keyed by the function's name in every
spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conelens.tracing import arithmetic, layouts, maps, nonlinear

RULES: dict[str, Callable[..., Any]] = {**layouts.RULES, **maps.RULES, **nonlinear.RULES, **arithmetic.RULES}
