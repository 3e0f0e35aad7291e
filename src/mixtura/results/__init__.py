"""What a comparison measured, as typed records: the interface between the parts that train and those that report.

`comparison`, `training` and `tasks` make these records, `report` reads them, and neither knows the other. Nothing here
needs torch.
"""

from mixtura.results.conclusions import ArmSummary as ArmSummary
from mixtura.results.conclusions import Difference as Difference
from mixtura.results.conclusions import Interval as Interval
from mixtura.results.conclusions import Summary as Summary
from mixtura.results.document import SCHEMA_VERSION as SCHEMA_VERSION
from mixtura.results.document import ArmDescription as ArmDescription
from mixtura.results.document import ArmResult as ArmResult
from mixtura.results.document import ArmTiming as ArmTiming
from mixtura.results.document import Leaks as Leaks
from mixtura.results.document import Results as Results
from mixtura.results.document import SearchRecord as SearchRecord
from mixtura.results.document import read_results as read_results
from mixtura.results.json_form import Facts as Facts
from mixtura.results.run import LOSS as LOSS
from mixtura.results.run import Measure as Measure
from mixtura.results.run import RunResult as RunResult
