"""How products, convolutions and attention are computed: the forms, and the table that chooses one by target and shape.

All forms of a kernel give the same numbers, up to rounding, and the models above do not depend on which is taken. Skip
this folder at first reading.
"""

from sdjax.models.kernels.forms import PLAIN, Forms, attend, convolve, forms_for

__all__ = ["PLAIN", "Forms", "attend", "convolve", "forms_for"]
