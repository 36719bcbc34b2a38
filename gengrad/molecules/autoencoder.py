"""The autoencoder of molecules: convolutions read a row of tokens into a code, an LSTM writes the row from the code."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from gengrad.molecules.tokens import END
from gengrad.registry import Configured, Settings

STRIDE = 4  # of the convolutions together
CHUNK = 1024  # molecules encoded or decoded at once


def on_sphere(z: Tensor) -> Tensor:
    """sqrt(d) z / |z|, (n, d) -> (n, d)."""
    return z * (z.shape[1] ** 0.5 / z.norm(dim=1, keepdim=True).clamp_min(1e-6))


class Autoencoder(nn.Module, Configured):
    """z = encoder(tokens), tokens = decoder(z), with no prior on z and no KL term: codes lie on a sphere.

    There no code can flee from the noise of the training by growing, so that noise decides how much of the sphere each
    molecule fills, and whether there is something to decode between two of them. The decoder sees z's direction alone.

    Encoder: embedding, three convolutions, one linear map of all places. Decoder: an LSTM that reads, at each place,
    the token before it and what a linear map of the code says of this place; the code also sets its first state.
    tokens: (n, T) with ``symbols`` different values, T <= ``places``; z: (n, latent).
    """

    class Config(Settings):
        latent: int = Field(64, ge=2)
        embedding: int = Field(32, ge=1)
        channels: int = Field(128, ge=1)  # of the encoder
        width: int = Field(256, ge=1)  # of the LSTM
        readout: int = Field(64, ge=1)  # numbers that the code says of each place

    def __init__(self, config: Settings | None = None, *, symbols: int, places: int, **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        c = self.config
        self.symbols, self.places = symbols, -(-places // STRIDE) * STRIDE
        self.embedding = nn.Embedding(symbols, c.embedding)
        self.convolutions = nn.Sequential(
            nn.Conv1d(c.embedding, c.channels, 5, padding=2), nn.SiLU(),
            nn.Conv1d(c.channels, c.channels, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv1d(c.channels, c.channels, 5, stride=2, padding=2), nn.SiLU(),
        )  # fmt: skip
        self.pool = nn.Linear(c.channels * (self.places // STRIDE), c.latent)
        self.before = nn.Embedding(symbols + 1, c.embedding)  # the token before, ``symbols`` for none
        self.state = nn.Linear(c.latent, 2 * c.width)
        self.place = nn.Linear(c.latent, self.places * c.readout)
        self.lstm = nn.LSTM(c.embedding + c.readout, c.width, batch_first=True)
        self.head = nn.Linear(c.width + c.readout, symbols)

    # ---------------------------------------------------------------- codes

    def encode(self, tokens: Tensor) -> Tensor:
        """tokens (n, T) -> z (n, latent), on the sphere of radius sqrt(latent): the mean square coordinate is 1."""
        tokens = functional.pad(tokens.long(), (0, self.places - tokens.shape[1]), value=END)
        return on_sphere(self.pool(self.convolutions(self.embedding(tokens).mT).flatten(1)))

    def _first(self, z: Tensor, places: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the code says of the first ``places`` (n, places, readout), and the LSTM's first state."""
        z = on_sphere(z)
        said = self.place(z).view(len(z), self.places, -1)[:, :places]
        hidden, cell = self.state(z).chunk(2, dim=1)
        return said, (hidden.tanh()[None].contiguous(), cell[None].contiguous())

    def logits(self, z: Tensor, before: Tensor) -> Tensor:
        """Scores (n, T, symbols) of the token at each place given those ``before`` it (n, T)."""
        said, state = self._first(z, before.shape[1])
        hidden, _ = self.lstm(torch.cat([self.before(before), said], dim=2), state)
        return self.head(torch.cat([hidden, said], dim=2))

    def shifted(self, tokens: Tensor) -> Tensor:
        """The tokens before each place (n, T), int64: none before the first."""
        nothing = torch.full_like(tokens[:, :1], self.symbols, dtype=torch.long)
        return torch.cat([nothing, tokens[:, :-1].long()], dim=1)

    # ---------------------------------------------------------------- decoding

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """The most likely token at each place in turn (greedy), z (n, latent) -> int16 rows (n, places).

        No row ends at its first place: an empty one would be no molecule. A row that does not end is as long as the
        places.
        """
        return torch.cat([self._decode(part) for part in z.split(CHUNK)]) if len(z) else z.new_zeros(0, self.places)

    def _decode(self, z: Tensor) -> Tensor:
        said, state = self._first(z, self.places)
        rows = torch.zeros(len(z), self.places, dtype=torch.int16, device=z.device)
        token = torch.full((len(z),), self.symbols, device=z.device)
        running = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for place in range(self.places):
            inputs = torch.cat([self.before(token), said[:, place]], dim=1)[:, None]
            hidden, state = self.lstm(inputs, state)
            scores = self.head(torch.cat([hidden[:, 0], said[:, place]], dim=1))
            if not place:
                scores[:, END] = -torch.inf
            token = torch.where(running, scores.argmax(1), END)
            rows[:, place] = token.to(torch.int16)
            running = token != END
            if not running.any():
                break
        return rows
