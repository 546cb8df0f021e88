"""What the studies say, and what they do not: written by a person once the numbers are known, shown by results.py."""

# What holds and what does not, for a reader in a hurry; the tables below have the intervals.
SHORT = (
    (
        "**Spade** is ahead of its own control, the same contrast without spatial selection, at everything asked of "
        "hippocampi after 3,000 steps (body boxes as frame), with every seed. Shuffled correspondences undo what it "
        "gains in neighbours, clusters, landmarks and decoded places; in the encoder they leave half of the gain in "
        "turned and scaled places (+0.06 and +0.08), and all of that in Dice (+0.018). After 300 steps it is ahead at "
        "clusters and decoded places only. Over the run from scratch Dice goes both ways: on phantoms +0.041 with "
        "four labelled subjects in one study, -0.079 with two in another; on hearts it loses, where the body frame "
        "knows no more of a crop's anatomy than filters that nobody trained."
    ),
    (
        "**DAGMaN**: after 300 steps the order of its ladder differs between three data sets, so no claim about "
        "Dice is borne out; the noisy teacher keeps entropy in stage 2, and heads no further apart. With 1,500 steps "
        "on hippocampi the plain `smit` is ahead of it at everything, with every seed. Eight times the rate and eight "
        "times the cells show no order either: seeds differ by more than the parts do. Of steps, batch, temperature "
        "and mask ratio, a batch three times as large is all that moved anything on a development fold (clusters, log)."
    ),
    (
        "**SPAN**: heads that are told a region find it two to five times as precisely as the best head of an encoder "
        "that is told nothing, from a crop alone. Where the prior that taught them knows places only, they pass it on "
        "phantoms (+0.040, +0.028 to +0.053) and on hippocampi (with every seed of two folds: 0.746, the prior 0.731, "
        "by subjects -0.011 to +0.040; on the fold kept for the confirmation 0.676 and 0.637, +0.011 to +0.070), on "
        "its own cells and crop by crop; where all crops count together they are behind, as attention knows no scale. "
        "On hearts they stay below a prior of place and brightness that a registration laid on the judged scan (0.67, "
        "0.76); without registration they are ahead of theirs in the mean of every seed (0.52 and 0.43; by place alone "
        "0.38 and 0.31), with intervals that hold 0 (-0.061 to +0.231, -0.033 to +0.178)."
    ),
    (
        "**FocusContrast**: views that keep what is salient gain nothing here, by gaze on phantoms or by attention on "
        "real scans: another scan's saliency does as well, also where focused views have more Dice than ordinary ones "
        "(hearts, +0.025, every seed). So on Spade, and on SimCLR. Its mask costs clusters on both. Its claim "
        "about lesions is not tested: so few labels and steps find no lesion with any views."
    ),
    (
        "**CLARiTy**: each of its pieces helps to point at findings, but for the teacher; texture without contrast "
        "is not found."
    ),
    (
        "**Few labels**: after 300 steps of pretraining seeds and draws of labelled subjects matter more than any "
        "method."
    ),
)

# Name of a result -> what it says.
NOTES = {
    "few_shot_hippocampus_mr": (
        "Width 12, crops of 24 voxels, encoders of 300 steps. With one and four subjects Spade has about two "
        "hundredths more, with all DAGMaN has; with two, eight and sixteen nothing. Only one difference has the same "
        "sign with every seed and draw, which matter more than arms do: 300 steps limit all from eight subjects on. "
        "Three thousand steps of pretraining and a decoder that is handed on were tried on another fold, and changed "
        "nothing (log). Not every seed was run with every draw. The judges had been seen once before, in a first "
        "design of 100 steps that was flat in the number of labels; steps and rate were then chosen on another fold."
    ),
    "few_shot_heart_mr": (
        "At 4 mm in plane, of six subjects that judge: too few for the intervals to be trusted. 200 steps are too few "
        "to gain by more than four subjects. DAGMaN gains with two and, as Spade does, loses with sixteen; the rest "
        "is not told from chance."
    ),
    "few_shot_abdomen_ct": (
        "Phantoms at 8 mm with five organs; 45, of which 36 teach. Pretraining for 300 steps does not help: Spade "
        "gains with one and four subjects and loses with two and all, every arm loses with two, and seeds and draws "
        "matter more than arms. The rate was chosen on another fold for the run from scratch (four subjects, one seed: "
        "0.390, 0.526, 0.573 at 3e-3, 8e-3, 1.6e-2). There Spade had 0.444, 0.549, 0.640, but its encoder had seen "
        "those judges, without their labels: the rate does not decide, and one seed and draw say little. Crops of 192 "
        "mm hold half a body, so Spade left out its global contrast, as it does where too few crops lie apart."
    ),
    "contrast_hippocampus_mr": (
        "Crops of 16 mm in boxes around the hippocampus. As on the phantoms Spade clusters better than its control, "
        "by its positives, and its decoder finds places of turned and scaled views again (0.24 untrained, 0.33 the "
        "control, 0.42 and 0.44 Spade). Here its encoder does so, too, a little more often than the control in every "
        "seed, but hardly more than the untrained one. A crop's nearest neighbour in another scan shows the same "
        "anatomy less often (in every seed; positives alone lose 0.031, negatives alone nothing), and with four "
        "labelled subjects Dice is no better: by seeds -0.009, -0.060, +0.002. Shuffled correspondences have the "
        "highest Dice (+0.024, +0.012, +0.005): what the fine-tuning gains does not come from matched places, and "
        "seeds of one arm lie as far apart as arms. What stands in the way, as far as was looked: frames of two "
        "hippocampi miss by 2.9 mm in the median and 5.1 at the 90th percentile (below), in an organ whose two parts "
        "are 10 to 20 mm long, so counterparts of other scans often are other anatomy; and 300 steps. Boxes, which fit "
        "them better (2.5 mm), are in the next table; it was the steps, two tables on."
    ),
    "contrast_few_shot_abdomen_ct": (
        "Phantoms at 8 mm with five organs, crops of 128 mm, affine frames, four labelled subjects. Spade has the most "
        "Dice of all arms (0.440): +0.065 over its control with every seed, and more than the run from scratch with "
        "every seed (+0.041; by seeds +0.085, +0.024, +0.013). Positives alone, negatives alone and shuffled "
        "correspondences have half of that at most over the control, and not with every seed: here it takes both, and "
        "the right places. Clusters and decoded places gain as in the table above; retrieval and landmarks are level "
        "with the control, and place alone is better at both (on hippocampi, below, it took more steps). Ten subjects "
        "judge, three seeds lie 0.16 apart, and in "
        "the study of numbers of labels (crops of 192 mm, no global contrast) the same phantoms said otherwise."
    ),
    "contrast_boxes_hippocampus_mr": (
        "The same with the frame of boxes (`--crop.frame box`), of which the table above said that it was not tried; "
        "judged by the same subjects. Dice is level with the control now (0.000, by seeds -0.017, +0.038, -0.021; with "
        "affine frames -0.022) and clusters gain less. Retrieval loses as much (-0.020) and landmarks a little more: "
        "the frame is not what stands in the way."
    ),
    "contrast_overlaps_hippocampus_mr": (
        "A second remedy that is none: boxes again, and partners that share 0.6 to 0.9 of a crop instead of 0.2 to "
        "0.8, for crops of 16 mm that share a fifth show other anatomy and were called alike all the same. Retrieval "
        "and landmarks lose what they lost. What stood in the way is in the next table."
    ),
    "contrast_long_hippocampus_mr": (
        "The same as with boxes, with ten times the steps: steps were what stood in the way. Spade is ahead of its "
        "control at everything that is asked here, with every seed: neighbours in other scans (+0.027, now also above "
        "place alone, 0.607), clusters, landmarks (0.8 and 1.2 mm closer), turned and scaled places in its decoder "
        "and, for the first time by more than two hundredths, in the encoder that is handed on (which finds 0.061 and "
        "0.077 more of them than before training), and Dice with four labelled subjects (+0.018). Shuffled "
        "correspondences turn the first three around (retrieval -0.035, clusters -0.41, landmarks 1.4 mm farther) and "
        "undo the decoded places: those gains are by the right places. Of turned and scaled places in the encoder they "
        "leave half (+0.034 and +0.037, every seed), and all of the Dice: shuffled have as much of it "
        "(+0.019), and both as much over the run from scratch (+0.012 with two of three seeds, +0.014 with all). So "
        "what the fine-tuning gains here comes of learning longer with positives in other scans, whatever these show. "
        "Place alone still finds landmarks far closer. How it was found: after 300 steps the very vector that the "
        "global contrast compares retrieved 0.42 to 0.52 of training crops, place alone 0.62: the contrast had not "
        "learned yet what it is told (log). A longer run was then tried on another fold, with one seed, before this "
        "study was begun; the judges are those of the tables above."
    ),
    "contrast_heart_mr": (
        "Short-axis hearts at 4 x 4 x 8 mm, crops of 96 x 96 x 64 mm; one organ, whose ends no scan shows: no "
        "clusters or landmarks. Spade does what it is for: its decoder finds places of turned and scaled views again, "
        "0.45 and 0.51 of them, where the control finds 0.31 and 0.35 and random weights 0.26 and 0.29; by its "
        "positives, and shuffled correspondences undo it. In the encoder, which is what is handed on, it finds 0.085 "
        "and 0.065 more of them than random weights, with every seed, and the control nearly as many. Retrieval falls "
        "(-0.032), and that has a reason: of training scans the frame itself finds the right neighbour in 0.44, "
        "filters that nobody trained in 0.45 to 0.49 (log), so what is learned of place can gain nothing here. With "
        "four labelled subjects nothing gains: every arm has less Dice in the mean than the run from scratch (0.520), "
        "Spade 0.484, its control 0.504, and seeds lie further apart than arms. Ten subjects judge; the rate was "
        "chosen for the run from scratch, on another fold, of which some judge here. Affine frames leave 3 of 40 "
        "scans unplaced."
    ),
    "contrast_long_heart_mr": (
        "The same with 1,500 steps, against the control and random weights. Five times the steps take Spade's decoder "
        "from 0.45 and 0.51 of the turned and scaled places to 0.60 and 0.66 (control 0.33 and 0.38, every seed), and "
        "its encoder from +0.085 and +0.065 over random weights to +0.133 and +0.109, a hundredth ahead of the "
        "control at turned ones with every seed. What they do not change is retrieval (-0.034) and Dice (0.489, "
        "control 0.491, scratch 0.501; signs by seeds differ). What stands in the way is the frame: by place alone "
        "the right neighbour is found in 0.383, by chance in 0.323, at best in 0.963. So Spade is asked to make alike "
        "what only seems to lie at one place. The learned frame, tried on fold 1 with one seed and 300 steps, turned "
        "-0.039 against the control into +0.030; both intervals hold 0."
    ),
    "distillation_long_hippocampus_mr": (
        "Were 300 steps too few for DAGMaN's order to show? Its two ends with 1,500 steps move apart, the "
        "other way: `smit` leads in clusters (3.10 against 2.24, at 300 steps 2.02 and 1.99), landmarks (1.6 mm), "
        "retrieval and Dice (+0.012), each with every seed; its Dice is level with scratch (seeds -0.008, +0.034, "
        "-0.013). So steps are not the reason. What fits: the noisy teacher sees three of ten patches of 24 voxels' "
        "crops, and a student that agrees with it keeps its heads where they began: in stage 1 dagman's entropy and "
        "divergence lie between those of random weights and of `smit` with every seed, in stages 2 and 3 with two of "
        "three. That is the paper's claim about entropy, as it would look where it is no gain. Fewer "
        "dropped patches, more cells (`--distill.stage 1`), batches and temperatures were not tried for want of time."
    ),
    "distillation_cells_hippocampus_mr": (
        "Eight times the rate and 216 cells instead of 27 (`--distill.stage 1`): heads now look somewhere (entropy of "
        "stage 4 0.80 to 0.96, random weights 0.99). On fold 1, where this was chosen, both parts together had more "
        "retrieval than `smit` and raised the entropy of stages 2 and 3 with every seed, as the paper says. On these "
        "judges they do not: retrieval +0.003, -0.043, +0.005, entropy of stage 3 -0.089, -0.050, +0.097. Between the "
        "arms almost every difference has both signs by seeds: clusters semantic +0.93, +0.43, -0.50, noisy +0.43, "
        "-0.83, +0.80, both -0.19, -0.29, +0.59. What every seed says: either part alone lowers the entropy of stage "
        "4, and the noisy teacher alone finds the middle of a structure less well. Every arm finds fewer neighbours "
        "and landmarks than random weights, and in the mean tighter clusters. So rate and cells are not why the "
        "paper's order is not found; three seeds differ by more than the parts do."
    ),
    "distillation_heart_mr": (
        "The same hearts in crops of 192 x 192 x 64 mm. Spade with DAGMaN on one encoder has more Dice than `smit` in "
        "every seed (+0.041), for twice the seconds, and about as much as the run from scratch (0.529 and 0.520; by "
        "seeds +0.040, -0.002, -0.012): it is the only arm that does not lose. Semantic attention, the noisy teacher "
        "and both are level with `smit` or nearly so, and two do not help more than one. The noisy teacher keeps the "
        "entropy of stage 2 where it was before training, 0.001 above that of `smit`. Retrieval is told from untrained "
        "in no arm. The student of visible tokens is not told from the dense student of the paper, `dagman`: Dice "
        "+0.002 (-0.014 to +0.019), by seeds -0.023, +0.027, +0.003. Of one organ there are no clusters, and no "
        "landmarks where its ends are cut off."
    ),
    "distillation_hippocampus_mr": (
        "Of the paper's claims one is found: semantic attention helps (Dice +0.025 over `smit`, in every seed). The "
        "noisy teacher does not, alone or with it: both together are level with `smit`. It hides seven in ten patches "
        "of crops that have 27 cells, from a teacher of 300 steps. The student of visible tokens, heads guided by "
        "bands of brightness, and Spade with DAGMaN on one encoder gain over `smit`, too, and with semantic attention "
        "alone all four have more Dice than the run from scratch with every seed (+0.028, +0.013, +0.023 and +0.021 in "
        "the mean, of which no interval was taken): three seeds, one draw of four labelled subjects, one fold. At "
        "retrieval and landmarks two of the arms come near the untrained encoder, and none is better than place alone; "
        "clusters differ more by seeds than by arms, but for Spade with DAGMaN. Entropies lie within a hundredth of "
        "uniform; the noisy teacher raises that of stage 1 by 0.001, and with semantic attention that of stage 3. The "
        "student of visible tokens has more Dice than the dense student of the paper, `dagman`: +0.032, by seeds "
        "+0.023, +0.038, +0.036 (no interval was taken)."
    ),
    "distillation_few_shot_abdomen_ct": (
        "Phantoms at 8 mm with five organs, crops of 192 mm, four labelled subjects. Here it is the noisy teacher that "
        "helps (+0.070 over `smit`, with every seed), and semantic attention alone that does not (-0.027, every seed); "
        "both are between (+0.048, one seed against it). On hippocampi it was the other way round, on hearts neither: "
        "three data sets, each with its own order, so none of the paper's claims about Dice is borne out at this "
        "size. Only the noisy arms come near the run from scratch (0.427; noisy 0.441, above it with one seed), and "
        "seeds lie 0.15 apart. What the paper says of heads holds for the entropy of stage 2 alone: with the noisy "
        "teacher, by itself or with semantic attention, it is higher than `smit`'s, here by 0.002 where 1 is uniform, "
        "with every seed of three data sets (these phantoms, hippocampi, hearts; of the phantoms above with two of "
        "three). But the noisy teacher does not set heads apart: in stage 2 the spread of entropy over heads "
        "(0.001, `smit` 0.003, untrained 0.001; in the file) and the Jensen-Shannon divergence (0.0023, `smit` "
        "0.0063, untrained 0.0021) are lower than `smit`'s with every seed of the same three: heads grow alike, and "
        "are near what they were before training. In stage 3 the signs of entropy and divergence differ by seed, but "
        "for both parts on hippocampi (more entropy, less divergence, every seed). And semantic attention alone does "
        "not lower the entropy of stage 1: here it raises it with every seed (+0.0007), elsewhere seeds disagree. "
        "Every pretrained encoder clusters organs better than random weights (2.0 to 2.8 against 1.5), and finds "
        "landmarks worse."
    ),
    "priors_abdomen_ct": (
        "Two seeds, ten subjects. Heads guided by where each organ lay in one labelled scan, without its brightness, "
        "find organs far better than any head without a prior (0.57 against 0.19 of the best one, chosen on training "
        "scans, and 0.17 of random weights), and they read the image, for nobody tells them where a crop lies. But "
        "they do not beat the prior that taught them, which is told: level in the mean, better at the right kidney, "
        "worse at the liver, and behind where all crops count together, as attention knows no scale. Their loss is "
        "level over the last 200 of 700 steps, in which the rate falls; whether more steps pass the prior was not "
        "tried. With the scan's brightness in the prior, 600 steps and one seed had said the same (log); on cells of "
        "20 mm, 500 steps fell well short of it (0.61 against 0.75, development phantoms). An atlas, a wrong prior "
        "and what is handed on are in the next table."
    ),
    "priors_hippocampus_mr": (
        "Three seeds, 16 subjects, 300 steps, cells of 4 mm; the prior is one labelled scan's mask, carried over, "
        "times the likelihood of its brightness. Guided heads find the two parts of a hippocampus in 0.51, far above "
        "the best head without a prior (0.14), random weights (0.14) and heads that followed the other part's prior "
        "(0.25), with every seed: the region that a head is told is what it learns. But the prior itself has 0.76, "
        "and they fall short of it by 0.25: they have not learned it yet, let alone passed it. Handed on: a linear map "
        "on frozen features tells the parts better than without a prior (+0.047 average precision, every seed), and "
        "as well with the priors changed over, which tell the same two places under each other's name. Dice with four "
        "labelled subjects is level, scratch included (0.727 to 0.731)."
    ),
    "priors_atlas_abdomen_ct": (
        "Five-organ phantoms at 8 mm, cells of 32 mm, 300 steps, three seeds: a prior of place and brightness from "
        "one labelled scan, an atlas of four, and that of another organ. Guided heads find organs in 0.41 and 0.42 "
        "(atlas), far above the best head without a prior (0.19), random weights (0.12) and heads of the wrong organ "
        "(0.09), with every seed. The priors alone have 0.68 and 0.74: an atlas is the better prior, and its heads "
        "hardly learn more of it in 300 steps. Nothing is handed on here: a linear map tells organs no better than "
        "without a prior, and of Dice (0.39, 0.38) the run from scratch has more (0.43)."
    ),
    "priors_rate_abdomen_ct": (
        "Phantoms at 8 mm, 180 that teach, 90 others that judge, three seeds; prior of place alone; rate, weight and "
        "network as on the hippocampi below. Steps (3,500) and scans are more than in a first look at another fold of "
        "half of them, which had shown +0.016 (-0.005 to +0.038, 2,500 steps, one seed). Guided heads are ahead of the "
        "prior that taught them (+0.040, +0.028 to +0.053; by seeds +0.044, +0.032, +0.046): at spleen and left kidney "
        "clearly, at the right kidney just so, and level at the liver, which fills its place. So scans and steps carry "
        "heads past their prior. On cells of 2 voxels, finer than the head's, the prior is level; where all crops "
        "count together it stays ahead, for attention sums to one in every crop."
    ),
    "priors_location_hippocampus_mr": (
        "Width 24, 1,500 steps, and a prior that does not read the image: where the two parts lay in one labelled "
        "scan. Guided heads find them in 0.715, the prior alone in 0.723 (by seeds -0.012, 0.000, -0.013): level, and "
        "the prior is told where a crop lies by a registration of the judged scan, the head by the crop alone. So it "
        "reads the image; ahead of what taught it it is not. On the fold on which this was tried first, with one "
        "seed, it was (0.701 against 0.665). The best head without a prior has 0.13, heads whose prior was moved away "
        "0.05, with every seed. The loss was still falling."
    ),
    "priors_rate_hippocampus_mr": (
        "The same with four times the rate (4e-3), chosen on fold 1, and 40 subjects that judge, of whom 16 are "
        "those of the table above. Guided heads are ahead of the prior that taught them with every seed (+0.017, "
        "+0.018, +0.008), but the interval over subjects holds 0; ahead at the posterior part (+0.024, -0.001 to "
        "+0.050), level at the anterior one. On fold 1, where the rate was chosen (one seed, 16 subjects), +0.052"
        " (+0.013 to +0.092). The prior is told by a registration of the judged scan where a crop lies, the head "
        "by the crop alone: it reads the image, and learns the mean of what the prior gets wrong from scan to "
        "scan. On finer cells, which no head here has, the prior is level (-0.012, -0.041 to +0.017), and where "
        "all crops count together it is ahead (0.728, heads 0.620), for attention sums to one in every crop. "
        "Wrong and free arms: below."
    ),
    "priors_rate_controls_hippocampus_mr": (
        "The controls of the table above, with the first two of its seeds: heads told the wrong place follow it and "
        "find less than a uniform map, and of heads told nothing the best, chosen on labelled training scans, finds a "
        "fifth of what guided ones do."
    ),
    "priors_rate_fold2_hippocampus_mr": (
        "The same once more, nothing changed, on the fold that no choice was made on: guided heads are ahead of the "
        "prior that taught them with every seed (+0.043, +0.015, +0.060), and by subjects (+0.011 to +0.070), at "
        "either part. On cells of 2 voxels the prior is behind by less (+0.017, -0.013 to +0.050); where all crops "
        "count together it stays ahead."
    ),
    "priors_heart_mr": (
        "Short-axis hearts, 300 steps, cells of 8 x 8 x 16 mm, one region: the cavity of the left ventricle. The "
        "guided head finds it in 0.43, the best head without a prior in 0.12, a head whose prior was moved away in "
        "0.05. The prior alone has 0.76: blood is bright here, so a prior of place and brightness is nearly the "
        "answer, and 300 steps do not reach it. What was gained for other uses: a linear map on frozen features tells "
        "the ventricle better than without a prior (+0.053 average precision, every seed; a moved prior has half of "
        "that, every seed too, and its interval holds 0), and with four labelled subjects Dice is higher (+0.024, two "
        "of three seeds; +0.014 with a moved prior): some of the gain comes from having a prior at all. Ten subjects "
        "judge."
    ),
    "priors_long_heart_mr": (
        "Five times the steps, four times the rate, twice the width, all chosen on fold 1. The guided head finds the "
        "ventricle in 0.67 instead of 0.43, random weights' best head in 0.13. Its prior, of place and brightness, has "
        "0.76: the head stays below it with every seed, but the interval over ten subjects holds 0. It is level or "
        "ahead in four subjects and far behind in three (0.13, 0.37 and 0.45 against 0.69 to 0.75). On fold 1 "
        "(one seed, not in the table) it was ahead: 0.58 against 0.46 (+0.12, -0.05 to +0.32), nearly all of it in "
        "two scans that could not be placed, where the prior knows nothing and the head 0.52 and 0.73. So the head "
        "reads the image, by itself and wherever the crop lies; that it beats what taught it is not shown. A prior "
        "moved away and heads without one were not trained at this length; at 300 steps they have 0.05 and 0.12."
    ),
    "priors_views_heart_mr": (
        "The same with views zoomed, turned and recoloured, as the three subjects above asked for. On fold 1 that "
        "helped (+0.21 over the prior, +0.02 to +0.40, one seed); here it does not: 0.63, below the prior (-0.13) with "
        "every seed and an interval without 0, and the same three subjects are no better. What was chosen on ten "
        "subjects does not carry over to ten others."
    ),
    "priors_box_heart_mr": (
        "Priors that no registration carries over: SPAN's are places in the picture, while ours above were laid on "
        "each judged scan by `affine`, which reads the image itself. Body boxes do not (`--crop.frame box`); with "
        "views zoomed, turned and recoloured. Both were chosen on other runs: of 500 steps, place alone, one seed, "
        "heads had on fold 1 and fold 2 +0.069 and -0.176 over the registered prior, +0.071 and +0.068 over that of "
        "boxes; with views and 1,500 steps on fold 1 +0.117. So fold 2 is no clean judge of the frame, fold 0 is. Both "
        "together, twenty subjects, three seeds: by place and brightness (`guided`) heads find the ventricle in 0.52, "
        "the prior in 0.43 (+0.088, by seeds +0.102, +0.086, +0.076); by place alone in 0.38 and 0.31 (+0.073, by "
        "seeds +0.066, +0.065, +0.088). On fold 0 alone, by seeds, +0.052, -0.005, +0.025 and +0.022, +0.029, +0.042. "
        "They read the image: where the prior finds next to nothing, heads do (prior 0.06, head 0.80; 0.06, 0.42), and "
        "the head by place and brightness is clear of the prior of place (+0.213, +0.082 to +0.339). But small "
        "cavities, of hypertrophic and healthy hearts, are found badly or not at all (0.07, the prior 0.83; the one "
        "labelled scan is of a failing heart), and the intervals over subjects hold 0 (-0.061 to +0.231, -0.033 to "
        "+0.178): twenty subjects taught. The registered prior above is the better one by far."
    ),
    "contrast_focus_abdomen_ct": (
        "Abdomens with a lesion each and the gaze of a simulated reader on it, Spade, 200 steps. Views that keep the "
        "gaze harm: ordinary views (`both`) cluster organs better (+0.413), find landmarks 4.2 mm closer and their "
        "decoder finds more of the turned and scaled views, all in every seed, and so do random views of focus's own "
        "zoom. Gaze of another patient and a blob in the middle, which mask views in the same way, do as `focused` "
        "does but for single places. So it is not the gaze that matters here, nor zooms or cutouts, which "
        "`focus-matched-zoom` has, too: it is the mask, which hides four fifths of one view of every second pair, of "
        "crops that are 24 voxels long, from a contrast that asks for places. Whether it helps where a label is about "
        "the lesion was not asked: nothing was fine-tuned."
    ),
    "contrast_focus_no_mask_abdomen_ct": (
        "The same with `--focus.mask_chance 0`, after the table above named the mask: clusters lose 0.076 instead of "
        "0.413, landmarks nothing instead of 4.2 mm, decoded places 0.03 instead of 0.08. What is left is a small "
        "loss at clusters, retrieval and decoded places, in every seed; a gain by gaze is not found. The default "
        "still masks, as the paper does. The judges are those of the table above."
    ),
    "focus_few_shot_abdomen_ct": (
        "The question that was open: Dice. The same kind of phantoms at 8 mm, five organs and the lesion that readers "
        "looked at, four labelled subjects, ten that judge, 300 and 200 steps. Nobody finds the lesion (Dice 0 in "
        "every run; the means count it): it has five voxels here, so the claim of FocusContrast, which is about "
        "lesions that a picture shows, is not tested by it. In the organs, focused views are level with ordinary and "
        "with random ones (0.399, 0.407, 0.401). The only arm that differs with every seed is the blob in the middle, "
        "and it has more (+0.028): no gain by gaze. Retrieval is a little better where views are steered by gaze, the "
        "right patient's or another's. Clusters and decoded places lose to the mask as above. Seeds lie further apart "
        "(0.29 to 0.48) than arms."
    ),
    "focus_hippocampus_mr": (
        "Real scans, which nobody's gaze goes with: saliency is the attention of the encoder that Spade made in 3,000 "
        "steps (`spade-saliency attention`; no labels). 300 and 200 steps, crops of 16 mm. As on phantoms, it is the "
        "mask that acts, not where it falls: the right scan's saliency, another's and a blob in the middle do alike "
        "(clusters 1.68 each, decoded places 0.35 to 0.37, Dice 0.737, 0.742, 0.739), and all three lose clusters and "
        "decoded places to ordinary views with every seed. Their Dice is level with ordinary views' (0.738) and in the "
        "mean above that of random and zoomed views (0.723, 0.718), but not with every seed. No gain by saliency."
    ),
    "focus_simclr_hippocampus_mr": (
        "The same on SimCLR, which FocusContrast was made for and which asks for no places. Focused views lose "
        "clusters there, too (1.78, ordinary 2.29, every seed), and another scan's saliency does as well (1.73); "
        "landmarks and retrieval are level with ordinary views, Dice is 0.013 below them in the mean (two of "
        "three seeds), with another scan's saliency 0.013 above (two of three). So what was found on Spade is not"
        " Spade's alone: no gain by saliency, and a mask that costs clusters. The saliency is an encoder's "
        "attention, though, not a reader's gaze."
    ),
    "focus_heart_mr": (
        "The same on hearts, saliency by the attention of an encoder that Spade made in 1,500 steps; fewer controls. "
        "Focused views have more Dice than ordinary ones (+0.025, every seed), and the encoder finds more turned and "
        "scaled places (+0.019, +0.018, every seed), the decoder fewer. But another scan's saliency has as much Dice "
        "(0.524): the gain is not by where the heart is. Over another scan's it leads in decoded places alone (+0.019, "
        "+0.023, every seed); random views retrieve better than focused ones (+0.038, every seed). Ten "
        "subjects judge, and nothing is clearly above scratch (0.501)."
    ),
    "hippocampus_mr_8": (
        "The pretraining of 400 steps changed nothing here, and the interval is narrow enough to say so."
    ),
    "contrast_abdomen_ct": (
        "Against its own control Spade gains at clusters, by its spatial positives, and in its decoder at finding "
        "places of a turned or scaled view again, which no arm without them does; shuffled correspondences undo "
        "both. Before training the decoder finds 0.11 of the turned and of the scaled twins, with `both` 0.32 and "
        "0.35; but it is not handed on. The encoder, which is, finds 0.44 and 0.45 before and 0.46 and 0.45 after: "
        "next to nothing, of which no interval was taken. Flipped twins are found a little more often (0.12 to 0.17, "
        "decoded 0.05 to 0.07) and stay far below the others, for Spade's flips are off by default and were off "
        "here. Its crops lay in the frame `--crop.frame box`, not in the default `affine`. MoCo and BYOL, which know "
        "no place, cluster organs still better, and lose the places; they also differ from the control in their "
        "batch (four anchors, not two with a counterpart each) and in heads that are standardised in every batch, "
        "and the latter is what finds landmarks (the log has it on Spade). At retrieval and landmarks every encoder "
        "is worse than place alone."
    ),
    "distillation_abdomen_ct": (
        "Semantic attention helps clusters a little, the noisy teacher in two of three seeds; that both together "
        "help more is not found at this length. At retrieval and landmarks every arm is worse than no training, "
        "and all than place alone. All entropies are within a hundredth of uniform: attention has hardly begun."
    ),
    "localisation_abdomen_ct": (
        "Each of the five pieces that were left out helps (`no-` rows); SegmentCAM takes the prior with it, so its "
        "row is of both. The teacher, which `clarity` does without, harms here: after its 200 steps it tells findings "
        "of studies it has not seen no better than chance (AUROC 0.455, 0.470, 0.466, from its kept answers), and "
        "what it teaches is that. Told in which organ a finding lies are all arms but Grad-CAM and the one without "
        "SegmentCAM, which cannot use it, by the organs of the studies that teach, as labels; of the studies that "
        "judge they are told nothing. The linear head under Grad-CAM learned next to nothing (AUROC), so its maps say "
        "more of that head than of Grad-CAM. Lumps that differ by texture alone (`striped_liver`) are hardly found: "
        "whole CLARiTy points into more of them than the middle of the true organ does, but its boxes fit them no "
        "better (IoU 0.045 and 0.050): there the organ is not beaten. Means by finding have no intervals. Not run: "
        "without prior, an attention head. The judges were seen twice on the way (the log says how); what mends was "
        "chosen on other scans, and no arm was changed after it was judged."
    ),
    "body_frames": (
        "A frame that cannot place a scan leaves its pairs out, which flatters it where it leaves out the hard "
        "ones: only the second table compares frames. There `affine` leads on abdomens; on hearts the medians of "
        "`learned` are 2.1 and 0.7 mm smaller, and where hearts are not cut `affine` is no better than the scanner's "
        "own coordinates; on hippocampi, cut around the labels, `centred` and `box` are ahead of both. One seed, no "
        "intervals: all pairs of a set of phantoms share 20 scans. The torso is one CT and one MR, two organs, seen "
        "while settings were chosen. "
        "`learned` refused no scan, not even two of a limb among trunks."
    ),
}
