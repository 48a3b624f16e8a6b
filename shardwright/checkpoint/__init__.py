"""Checkpoints: what training needs to go on, in safetensors files and an index in JSON, from any plan to any other.

==================  =======================================================================================
``dcp``             reads folders of ``torch.distributed.checkpoint``, and runs nothing that is in them
``export``          exports to Hugging Face weights, to DCP, to ``torch.save``
``files``           writes safetensors files, and reads their headers
``folder``          the folders of steps: made whole or not at all, the newest, those that are dropped
``huggingface``     reads folders of Hugging Face weights
``index``           what a checkpoint holds: tensors with their slices, and states; read and checked whole
``load``            loads a checkpoint into models, optimizers and others, all or nothing
``preemption``      notices that a job is to end soon, so that it can be saved first
``ranks``           lets the ranks of a job share what they know, and fail together
``reading``         verifies what files hold, and reads parts of it
``rewrite``         rewrites a checkpoint in other slices, a block of rows at a time
``save``            saves models, optimizers and others, each slice once
``source``          opens a folder of weights, whoever wrote it
``states``          takes nested states apart into tensors and JSON, and puts them together
``strategy_files``  reads strategy files in MindSpore's JSON form, and folders of ranks
``tensors``         what of a tensor this rank holds, and who writes it
==================  =======================================================================================
"""
