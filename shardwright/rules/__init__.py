"""Rules: what splitting an operator's dims means, in factor notation, and the operator's traits.

================  ==========================================================================================================
``attention``     rules of attention: samples and heads are free, and query positions without a causal mask
``conv``          rules of convolutions, pooling and resampling: batch and channels are free, spatial dims are whole
``create``        rules of operators that create tensors: each rank makes its own piece
``field_lookup``  an embedding in which each column of indices reads its own range of rows (``manual_split``)
``in_range``      raises the single device's error for indices out of range, where ranks look up in pieces
``index``         rules of operators that read or write at indices
``join_and_cut``  rules of operators that join tensors, cut them, write parts of them or move elements within
``loss``          rules of losses: the batch may be split, and so may the classes of a cross-entropy
``lowering``      writes an operator's local calls where they differ from the global call
``matmul``        rules of matrix products: the dim summed over leaves partial sums
``no_rule``       traits of operators that have no rule yet, or never need one: they run whole on every rank
``norm``          rules of normalisations: the dims whose statistics are taken stay whole
``notation``      reads rules as they are written, ``m k+, k+ n -> m n``
``opaque``        functions with a backward of their own: split where both work element by element
``pieces``        what several families of rules share: notation from lists of factors, local pieces, empty pieces
``pointwise``     every dim of the output is free, and inputs broadcast against it
``random``        in every layout the numbers are those of the single device
``random_draw``   the random numbers that the single device would draw for the whole tensor
``recurrent``     rules of recurrent networks and their cells: samples are free
``reduce``        rules of reductions, scans and sorts over dims: sums may be split, what is not linear keeps its dims whole
``registry``      from an operator call to its signature
``self_defined``  an operator that runs on its local pieces in layouts of the user's own (``self_define_shard``)
``tables``        every family of rules, and the traits of their operators: importing this module registers them all
``traits``        facts about operators besides their rules, one row beside each rule
``view``          rules of operators that give elements another shape or order, or repeat them: reshapes, transposes
================  ==========================================================================================================
"""
