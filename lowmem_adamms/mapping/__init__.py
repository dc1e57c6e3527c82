"""The first step: which donor tensor is blended into which of the base's.

plan                what a merge does, as pure data: Part, Step, Plan
arrange             what the donor has in another order than the base
join                make_plan: match the base's roles with the donor's
side                one of the two checkpoints, read by role
adapter             a LoRA adapter as the donor's side
tied_head           whether a checkpoint's head is its embedding
token_rows          which rows of embedding and head hold the same token
config_differences  settings in which the two configs differ
kinship             whether the two language models have an ancestor in common
alphas              the donor's weight, one number or one by layer and role
mixture             the plan of any method and number of donors, with an ancestor
mergekit_yaml       models and weights from mergekit's YAML
"""
