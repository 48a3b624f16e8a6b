"""Agreement: the processes of a job tell each other what they do, so that those that do different things find out.

================  ===================================================================================================
``checksum``      a number, or a few, that tell whether ranks hold the same tensor
``events``        the events of one rank: calls of nets and backward passes that all ranks have to make alike
``job_watch``     one watch per job: finds a world's, and passes on to it what other folders report
``messages``      the messages that ranks write into the job's store, and the verdict on each set of them
``numbers``       gathers a few numbers of every rank on all ranks
``processes``     which processes of the job have ended without a word
``random_state``  makes masks drawn on every rank the same
``signature``     describes a call of a net in words that the ranks of a job compare
``verdict``       describes in words how the events of several ranks differ
``watch``         compares this rank's events with those of the other ranks
``watcher``       a thread that answers for its rank while the program stands still
================  ===================================================================================================
"""
