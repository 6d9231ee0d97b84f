"""Analyses of what training changed: singular values, layers, biases, subspaces; and their figures."""

from .measures import Amplification as Amplification
from .measures import BiasChanges as BiasChanges
from .measures import ChangeSVD as ChangeSVD
from .measures import LayerChange as LayerChange
from .measures import LeafChange as LeafChange
from .measures import adapter_similarities as adapter_similarities
from .measures import amplification as amplification
from .measures import bias_changes as bias_changes
from .measures import change_svd as change_svd
from .measures import layer_changes as layer_changes
from .measures import leaf_changes as leaf_changes
from .measures import subspace_similarity as subspace_similarity
