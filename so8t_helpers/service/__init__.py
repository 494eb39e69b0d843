"""The /think service: question in, final part of the answer and decision out, everything audited."""
