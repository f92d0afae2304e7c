"""Trees, paths, rules, the Weight and Site sockets, losses as sums, and Method with its chain."""

from jaxlm.core.batch import MODEL_INPUTS, row_columns, text_rows
from jaxlm.core.catalog import Entry, entries, imported, node_class, nodes
from jaxlm.core.context import Context
from jaxlm.core.dropout import dropout
from jaxlm.core.kinds import check_fields, checked
from jaxlm.core.lookup import call, lookup, nearest
from jaxlm.core.loss import Batch, GradFn, Loss, LossFn, Tap, TaskLoss, Term, Terms, add_terms, total
from jaxlm.core.matmul import PRODUCT, kept, matmul, matmul_transposed
from jaxlm.core.method import Grads, Method, MethodInit, Step, Update, chain
from jaxlm.core.model import LM, Network
from jaxlm.core.parameter import Dim, Parameter, abstract, axis_names, axis_sizes, dim, initialize
from jaxlm.core.partition import merge, partition, trainable, trained_names, widened
from jaxlm.core.paths import (
    SEGMENT,
    ArrayInfo,
    Rules,
    Tree,
    arrays,
    canonical_path,
    check_rules,
    describe,
    first_match,
    flatten,
    is_stacked,
    map_leaves,
    matches,
    sizes,
    unflatten,
    with_arrays,
)
from jaxlm.core.site import Gate, Prefix, Site, Switch, Tokens, visit
from jaxlm.core.surgery import NO_DATA, Calibration, NoData, Surgery, SurgeryContext
from jaxlm.core.weight import Axes, Component, Node, Weight, Wrapper, attend, components, dot, materialize, take
from jaxlm.core.weights import Factored, FakeQuant, InputScaled, Masked, Quantized, Scheme
