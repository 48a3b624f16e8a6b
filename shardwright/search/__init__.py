"""Search: one choice per node at the least price. Knows nothing of tensors.

`problem` states what is to be solved and `solve` solves it; `integer_program` is an independent referee.
"""
