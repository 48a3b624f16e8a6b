"""Base: text, the user's source lines, and torch's private parts behind one door.

==================  ====================================================================================================
``derivatives``     refuses second derivatives of backward passes that have none
``dump``            writes the text of graph, plan and program after each pass
``opaque``          user functions recorded as one operator, with their own forward and backward
``operators``       facts about operators by name, for the floors below the rules
``process_groups``  facts about process groups that torch keeps in several places
``text``            numbers, bytes, seconds and lists as readable text
``torch_private``   the only door to PyTorch's private modules
``user_code``       the line of the user's program that caused an operator or a call
==================  ====================================================================================================
"""
