"""The cache: its format, and everything that writes, reads, checks and queries it.

layout.py, format.py      file names; schema, codebook, encodings, fingerprint
sparsify.py               what to keep of a teacher's distribution, as candidates.py holds it
writer.py, shard.py       write a shard; open one
documents.py, manifest.py read plan.json and manifest.json; rebuild the manifest, with card.py
reader.py, samples.py     an opened cache; the arrays of a sample
integrity/, query/        ``kd cache verify`` and what readers check; ``kd sql`` and selecting samples
publish.py                ``kd push``
"""
