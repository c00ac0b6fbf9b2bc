"""The theorems: bounds, certificates along a computed flow, and their verification on random problems."""

from lazyjax.theory import bounds as bounds
from lazyjax.theory.certify import Certificate as Certificate
from lazyjax.theory.certify import certify as certify
from lazyjax.theory.claims import Assumption as Assumption
from lazyjax.theory.claims import Claim as Claim
from lazyjax.theory.claims import Status as Status
from lazyjax.theory.errata import Counterexample as Counterexample
from lazyjax.theory.measurements import Measurements as Measurements
from lazyjax.theory.verify import Rates as Rates
from lazyjax.theory.verify import Score as Score
from lazyjax.theory.verify import Verification as Verification
from lazyjax.theory.verify import verify as verify
