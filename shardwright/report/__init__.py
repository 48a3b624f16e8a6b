"""Reports: plans as tables, pictures, explanations, differences and pages.

=============  =======================================================================================
``diff``       where two plans differ, and what that is worth
``draw``       the tensor with its pieces, and the device grid, in the same colours
``draw_plan``  operators as boxes in their order, with their slice counts, and what moves between them
``explain``    why an operator runs as it does, what that costs, and what else it could do
``lint``       operators that nobody configured and that a strategy would serve better
``overview``   repeated layers in one row, with prices; for graphs of thousands of operators
``page/``      one HTML file to look at, with nothing to fetch and nothing to install
``plan_view``  a plan with all that can be asked of it, what ``net.plan`` and ``plan_for`` hand out
``summary``    a plan on one page
``table``      one row per operator, with layouts, local shapes and collectives
=============  =======================================================================================
"""
