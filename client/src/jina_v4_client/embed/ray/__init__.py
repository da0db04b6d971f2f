"""`jina-v4-embed --ray`: the same work, with servers on the machines of a Ray cluster instead of an address.

The command reads, finds equal content and writes as ever; only its calls go another way. `pool` makes each call an
entry of a stream through Ray Data: `feed` has what waits, `worker` is an actor that starts `jina-v4-serve` on its node
(`server`) and embeds with it. No more is in the stream than calls are waiting, so nothing grows with the corpus, and
what a killed worker held is given to another.
"""
