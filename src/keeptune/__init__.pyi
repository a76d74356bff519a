import typing

from .adapter.export import ExportOptions as ExportOptions
from .adapter.install import install as install
from .api import attribute as attribute
from .api import collect as collect
from .api import export as export
from .api import generate_knowledge as generate_knowledge
from .api import measure as measure
from .api import plan as plan
from .core.errors import KeeptuneError as KeeptuneError
from .core.low_rank import LowRank as LowRank
from .core.plan import Plan as Plan
from .evaluation.benchmarks import FileBenchmark as FileBenchmark
from .evaluation.model_pairs import AdapterPair as AdapterPair
from .evaluation.model_pairs import TwoModels as TwoModels
from .experiments.gate import compare_served as compare_served
from .hosts.callback import Callback as Callback
from .pipeline.gguf_export import GgufOptions as GgufOptions
from .pipeline.gguf_export import export_gguf as export_gguf
from .pipeline.planning import PlanOptions as PlanOptions
from .pipeline.push import push as push
from .posthoc.repair import Repair as Repair
from .posthoc.repair import repair as repair
from .posthoc.weighted_merge import Merging as Merging
from .posthoc.weighted_merge import merge as merge
from .statistics.covariance import GradientCovariance as GradientCovariance
from .statistics.covariance import InputCovariance as InputCovariance
from .statistics.layer_effect import LayerEffect as LayerEffect
from .statistics.neuron_attribution import NeuronAttribution as NeuronAttribution
from .statistics.self_generated import SelfGeneration as SelfGeneration
from .studies.overlap import chosen_rows as chosen_rows
from .studies.trace import trace as trace
from .training.attach import attach as attach
from .training.guard import Guard as Guard
from .training.penalty_engine import Penalties as Penalties
from .training.projection import Projection as Projection
from .training.stm import stm as stm

def __getattr__(name: str) -> typing.Any: ...  # the classes of methods and penalties
