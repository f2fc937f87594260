"""The RAM engine: paths, advantages, targets (pure maths), and the policy, rollout and trainer that use them."""
