"""The names of ``gas_engine._safe_pickle`` under the path that adapters know."""

from .._safe_pickle import Record, attributes_of, read_pickle, state_dict_of

__all__ = ["Record", "attributes_of", "read_pickle", "state_dict_of"]
