"""Chat data: read, tokenized and packed once; training reads the result.

sources          files -> records
conversations    records -> conversations
template         chat templates: conversation -> text, and what each assistant turn generates
tokens           -> token ids, and which of them train
packing          -> rows of a fixed length
token_file       the file that training maps into memory
prepare          all of it, in several processes: python -m megatron_dft.data
preview          conversations with their trained tokens marked
"""
