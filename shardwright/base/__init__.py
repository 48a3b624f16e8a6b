"""What everything stands on: text, the user's source lines, torch's private parts behind one door.

==================  ====================================================================================================
``derivatives``     what a backward pass of this package can be asked for
``dump``            the text of graph, plan and program after each pass, for whoever wants to see what became of a model
``operators``       operators by name, for the floors below the rules and for whatever writes operators into graphs
``process_groups``  facts about them that torch keeps in several places
``text``            numbers, bytes, seconds and lists as people read them
``torch_private``   the only door to PyTorch's private modules
``user_code``       the line of the user's program that stands behind an operator or a call
==================  ====================================================================================================
"""
