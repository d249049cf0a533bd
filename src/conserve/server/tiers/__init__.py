"""Classes of requests: `service_tier` in, vLLM's `priority` out."""

from conserve.server.tiers.middleware import ServiceTierMiddleware

__all__ = ["ServiceTierMiddleware"]
