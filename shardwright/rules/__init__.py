"""Rules: for each operator what splitting its dims means, in factor notation, and its traits.

================  ==========================================================================================================
``attention``     samples and heads are free, the sequence of queries where no causal mask counts positions
``conv``          rules of convolutions, pooling and resampling: batch and channels are free, spatial dims are whole
``create``        every dim of the output is free, each rank makes its own piece
``field_lookup``  an embedding whose columns of indices each read a range of rows of their own (``manual_split``)
``in_range``      the error of the single device for an index that no row or class has, where ranks look up in pieces
``index``         rules of operators that read or write at indices
``join_and_cut``  rules of operators that join tensors, cut them, write parts of them or move elements within
``loss``          the batch may be split under every reduction, and so may the classes of a cross-entropy
``lowering``      how an operator's call becomes local calls where the local computation differs from the global one
``matmul``        rows and columns are free, the dim summed over leaves partial sums
``no_rule``       traits of operators that have no rule yet, or never need one: they run whole on every rank
``norm``          the dims whose statistics are taken stay whole, all others are free
``notation``      reads rules as they are written, ``m k+, k+ n -> m n``
``opaque``        functions with a backward of their own: split where both work element by element
``pieces``        what several families of rules share: notation from lists of factors, local pieces, empty pieces
``pointwise``     every dim of the output is free, and inputs broadcast against it
``random``        in every layout the numbers are those of the single device
``random_draw``   the random numbers that the single device would draw for the whole tensor
``reduce``        rules of reductions, scans and sorts over dims: sums may be split, what is not linear keeps its dims whole
``registry``      from an operator call to its signature
``self_defined``  an operator that runs on its local pieces in layouts of the user's own (``self_define_shard``)
``tables``        every family of rules, and the traits of their operators: importing this module registers them all
``traits``        what is known about an operator apart from its rule, one row beside the rule
``view``          rules of operators that give elements another shape or order, or repeat them: reshapes, transposes
================  ==========================================================================================================
"""
