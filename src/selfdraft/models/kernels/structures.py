"""The structures of `cpu/step.h`, as ctypes. Arrays are numpy's; a structure holds their addresses, and
whoever makes it keeps the arrays alive."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("outs", c_int32),
        ("ins", c_int32),
        ("at", c_int32),
    ]


class Layer(Structure):
    _fields_ = [
        ("qkv", Matrix * 3),
        ("out", Matrix),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("after_attention", c_void_p),
        ("after_mlp", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("angles", c_void_p),
        ("window", c_int32),
        ("unused", c_int32),
    ]


class Model(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)),
        ("head", Matrix),
        ("final_norm", c_void_p),
        ("embedding", c_void_p),
        ("embedding_type", c_int32),
        ("count", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("head_size", c_int32),
        ("rotated", c_int32),
        ("inner", c_int32),
        ("vocabulary", c_int32),
        ("activation", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("attention_cap", c_float),
        ("embedding_scale", c_float),
        ("residual_scale", c_float),
        ("logit_scale", c_float),
        ("logit_cap", c_float),
        ("wide", c_int32),
        ("joint_norms", c_int32),
    ]


class Memory(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("layer_bytes", c_int64), ("page_bytes", c_int64)]


class LowRank(Structure):
    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("rank", c_int32),
        ("ins", c_int32),
        ("outs", c_int32),
        ("at", c_int32),
        ("wide", c_int32),
        ("scale", c_float),
    ]


class Adapter(Structure):
    _fields_ = [
        ("low_rank", POINTER(LowRank)),
        ("embeddings", c_void_p),
        ("prefix_keys", c_void_p),
        ("prefix_values", c_void_p),
        ("prefix_table", c_void_p),
        ("prefix_layer_bytes", c_int64),
        ("sampler", LowRank),
        ("prefix", c_int32),
        ("embedding_scale", c_float),
    ]


class Batch(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("wanted", c_int32),
        ("table_width", c_int32),
        ("blocks", c_int32),
        ("token", c_void_p),
        ("position", c_void_p),
        ("request", c_void_p),
        ("slot", c_void_p),
        ("seen", c_void_p),
        ("above", c_void_p),
        ("above_start", c_void_p),
        ("tables", c_void_p),
        ("block", c_void_p),
        ("want", c_void_p),
    ]


class Inputs(Structure):
    _fields_ = [
        ("bytes", c_void_p),
        ("low", c_void_p),
        ("scales", c_void_p),
        ("floats", c_void_p),
        ("halves", c_void_p),
        ("groups", c_int32),
        ("unused", c_int32),
    ]


class Work(Structure):
    _fields_ = [
        ("hidden", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("inner", c_void_p),
        ("change", c_void_p),
        ("low", c_void_p),
        ("logits", c_void_p),
        ("pick", c_void_p),
        ("finite", c_void_p),
        ("inputs", Inputs),
        ("scratch", c_void_p),
        ("partials", c_void_p),
        ("partial_floats", c_int64),
        ("rank", c_int32),
        ("unused", c_int32),
    ]


__all__ = ["Adapter", "Batch", "Inputs", "Layer", "LowRank", "Matrix", "Memory", "Model", "Work", "ctypes"]
