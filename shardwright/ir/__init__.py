"""Values between the steps: frozen, printable, comparable. They know nothing of what is done with them.

==================  ==================================================================================================
``buckets``         which moves of a program share collectives
``choice``          one assignment of axes to an operator's factors, with the layouts that follow from it
``graph``           what capture makes of a callable, an operator-level program on global tensors
``instructions``    what a local program is made of, calls on local tensors and moves of values between layouts
``largest_piece``   the first rank's, found without looking at the others
``layout``          where every piece of a tensor is
``layout_entries``  entries of layouts as users write them: checked, and parsed from texts
``layout_text``     layouts as short texts and slice counts
``machine``         what devices compute, how fast they talk and how much they hold; read from TOML files
``marks``           what a user asked of an operator, a function or a module, carried through capture onto graph nodes
``mesh``            named axes with sizes over a list of ranks
``names``           names of operators as plan files and explanations spell them
``operator``        one call of a tensor operator, as rules see it: shapes and arguments, no graph
``pieces``          how a dim is cut into pieces, and where each begins and ends
``plan``            a choice for every operator and a layout for every value
``program``         what one rank runs
``program_text``    a local program as a person reads it
``rank_groups``     which ranks hold the same tensor
``redistribution``  the steps that turn one layout of a tensor into another
``signature``       how one operator call's dims map to factors, and what splitting each factor means
``step``            a collective over some axes of a mesh, or a local slice
``visitor``         does something else for every type of instruction, without a ladder of tests
==================  ==================================================================================================
"""
