-- captured_mass_curve: captured_mass for k = 1, 2, 4, 8, ... and the most candidates that a position holds.
--
-- columns  k; mass; worst_percentile; positions: those of captured_mass(k)
-- note     a threshold:TAU cache holds fewer at most positions, which then count with all they have; see captured_mass
-- example  SELECT * FROM captured_mass_curve
CREATE OR REPLACE VIEW captured_mass_curve AS
WITH held AS (
    SELECT max(list_max(list_transform(candidate_ids, lambda ids: len(ids)))) AS most FROM samples
), steps AS (
    SELECT DISTINCT least(2 ** step, most)::BIGINT AS k FROM held, range(20) AS powers(step)
)
SELECT captured.k, mass, worst_percentile, positions
FROM steps, captured_mass(steps.k) AS captured ORDER BY captured.k;
COMMENT ON VIEW captured_mass_curve IS 'captured_mass for k = 1, 2, 4, ... up to the most candidates of a position';
