"""placeholder until the metrics land"""
import msgspec
class Worst(msgspec.Struct, frozen=True): token_index: int = 0
class Bucket(msgspec.Struct): n_tokens: int = 0
