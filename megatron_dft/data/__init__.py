"""Preparation of chat data: validate, tokenize and pack it once, before training.

sources          files -> records
conversations    records -> conversations
template         conversation -> text of the chat template, and the span of each assistant turn
tokens           text -> token ids, and which of them are in the loss
packing          sequences -> rows of a fixed length
token_file       the file that training maps into memory
prepare          the whole pipeline, in several processes: megatron-dft data
preview          conversations with their trained tokens marked
"""
