"""Values between the steps: frozen, printable, comparable. They know nothing of what is done with them.

==================  ==================================================================================================
``buckets``         which moves of a program share collectives
``choice``          one assignment of axes to an operator's factors, with the layouts that follow from it
``graph``           an operator-level program on global tensors, captured from a callable
``instructions``    instructions of a local program: calls on local tensors, and moves of values between layouts
``largest_piece``   the shape of the largest piece of a tensor, which is the first rank's
``layout``          the placement of a tensor: which rank holds which piece
``layout_entries``  entries of layouts as users write them: checked, and parsed from texts
``layout_text``     layouts as short texts and slice counts
``machine``         speed of devices and links, and memory of devices; read from TOML files
``marks``           requests for an operator, a function or a module, carried through capture onto graph nodes
``mesh``            named axes with sizes over a list of ranks
``names``           names of operators as plan files and explanations spell them
``operator``        one call of a tensor operator, as rules see it: shapes and arguments, no graph
``pieces``          how a dim is cut into pieces, and where each begins and ends
``plan``            a choice for every operator and a layout for every value
``program``         the local program that one rank runs
``program_text``    a local program as readable text
``rank_groups``     which ranks hold the same tensor
``redistribution``  the steps that turn one layout of a tensor into another
``signature``       the factors that one operator call's dims map to, and what splitting each factor means
``step``            a collective over some axes of a mesh, or a local slice
``visitor``         calls a method per type of instruction
==================  ==================================================================================================
"""
