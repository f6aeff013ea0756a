// One image and its tokens as a page.
#include <algorithm>
#include <cmath>
#include <map>

#include "base/text.h"
#include "io/markup.h"
#include "tasks/visualize.h"

namespace pyra::tasks {
namespace {

using io::decimal;
using io::Markup;

constexpr double kPanel = 236, kGap = 14, kCaption = 22;
constexpr int64_t kColumns = 4;
constexpr double kGoldenAngle = 137.508;  // degrees: neighbours in the count lie far apart on the colour wheel

/// The patches of each token that holds any, by position; dropped ones under kDropped.
using Groups = std::map<int64_t, std::vector<int64_t>>;

Groups groups_of(const TokenGroups& block) {
  Groups groups;
  for (size_t patch = 0; patch < block.token_of.size(); ++patch)
    groups[block.token_of[patch]].push_back(int64_t(patch));
  return groups;
}

/// Squares of side 1, in units of patches.
std::string area_of(const std::vector<int64_t>& patches, int64_t side) {
  std::string path;
  for (const int64_t patch : patches) {
    path.append("M").append(std::to_string(patch % side)).append(" ").append(std::to_string(patch / side));
    path.append("h1v1h-1z");
  }
  return path;
}

/// The edges between patches of different tokens.
std::string borders_of(const TokenGroups& block, int64_t side) {
  std::string path;
  const auto token = [&](int64_t x, int64_t y) { return block.token_of[size_t(y * side + x)]; };
  const auto edge = [&](int64_t x, int64_t y, const char* line) {
    path.append("M").append(std::to_string(x)).append(" ").append(std::to_string(y)).append(line);
  };
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t x = 0; x < side; ++x) {
      if (x > 0 && token(x - 1, y) != token(x, y)) edge(x, y, "v1");
      if (y > 0 && token(x, y - 1) != token(x, y)) edge(x, y, "h1");
    }
  }
  return path;
}

/// A group keeps its colour as long as its first patch leads it.
std::string colour_of(const std::vector<int64_t>& patches) {
  constexpr std::string_view kHex = "0123456789abcdef";
  // A hue of full saturation as red, green and blue: each falls off with its distance on the wheel.
  const double hue = std::fmod(kGoldenAngle * double(patches.front()), 360) / 60;
  std::string colour = "#";
  for (const double centre : {0.0, 2.0, 4.0}) {
    const double apart = std::abs(hue - centre), distance = std::min(apart, 6 - apart);
    const auto value = size_t(20 + 215 * std::clamp(2 - distance, 0.0, 1.0));
    colour.append(1, kHex[value / 16]).append(1, kHex[value % 16]);
  }
  return colour;
}

std::string patches_text(size_t count) {
  return std::to_string(count) + (count == 1 ? " patch" : " patches");
}

/// Dropped patches go grey, single ones stay as they are, the others take their group's colour.
void draw_group(Markup& page, int64_t token, const std::vector<int64_t>& patches, int64_t side,
                int64_t protected_tokens) {
  const bool dropped = token == kDropped;
  if (!dropped && patches.size() == 1 && token >= protected_tokens) return;
  page.open("path", {{"d", area_of(patches, side)},
                     {"fill", dropped ? "#7f7f7f" : colour_of(patches)},
                     {"fill-opacity", dropped ? 0.85 : 0.5}});
  const std::string who = dropped                    ? "dropped"
                          : token < protected_tokens ? "merged into protected token " + std::to_string(token)
                                                     : "token " + std::to_string(token);
  page.element("title", who + ": " + patches_text(patches.size()));
  page.close();
}

std::string caption_of(const TokenGroups& block, const Groups& groups) {
  const auto dropped = groups.find(kDropped);
  return "after block " + std::to_string(block.block) + ": " + std::to_string(block.tokens) + " tokens" +
         (dropped == groups.end() ? "" : ", " + patches_text(dropped->second.size()) + " dropped");
}

void draw_panel(Markup& page, const TokenPicture& picture, const TokenGroups* block, size_t number,
                const std::string& pixels) {
  const int64_t side = picture.image.width / picture.patch_size;
  const double x = double(int64_t(number) % kColumns) * (kPanel + kGap);
  const int64_t row = int64_t(number) / kColumns;
  const double y = double(row) * (kPanel + kCaption + kGap) + kCaption;
  const Groups groups = block ? groups_of(*block) : Groups{};
  page.element("text", {{"x", x}, {"y", y - 6}}, block ? caption_of(*block, groups) : "the image");
  page.open("g", {{"transform", "translate(" + decimal(x, 2) + " " + decimal(y, 2) + ") scale(" +
                                    decimal(kPanel / double(side), 6) + ")"}});
  page.empty("use", {{"href", "#" + pixels}});
  for (const auto& [token, patches] : groups) draw_group(page, token, patches, side, picture.protected_tokens);
  if (block) {
    const std::string borders = borders_of(*block, side);
    page.empty("path", {{"d", borders}, {"fill", "none"}, {"stroke", "#000"}, {"stroke-width", 0.12}});
    page.empty("path", {{"d", borders}, {"fill", "none"}, {"stroke", "#fff"}, {"stroke-width", 0.05}});
  }
  page.close();
}

void draw_panels(Markup& page, const TokenPicture& picture) {
  const int64_t panels = int64_t(picture.blocks.size()) + 1;
  const int64_t columns = std::min(panels, kColumns), rows = (panels + kColumns - 1) / kColumns;
  const double side = double(picture.image.width) / double(picture.patch_size);
  page.open_svg(double(columns) * (kPanel + kGap) - kGap, double(rows) * (kPanel + kCaption + kGap),
                "Merged tokens of " + picture.path,
                "The image, and after each block that merges the patches that stand together in one token: groups of "
                "two and more in a colour of their own, borders between groups, dropped patches grey.");
  const std::string pixels = page.id();
  page.open("defs");
  page.empty("image", {{"id", pixels},
                       {"width", side},
                       {"height", side},
                       {"preserveAspectRatio", "none"},
                       {"href", "data:image/png;base64," + io::base64(data::encode_png(picture.image))}});
  page.close();
  draw_panel(page, picture, nullptr, 0, pixels);
  for (size_t i = 0; i < picture.blocks.size(); ++i) draw_panel(page, picture, &picture.blocks[i], i + 1, pixels);
  page.close();
}

void write_table(Markup& page, const TokenPicture& picture) {
  page.open("table");
  page.element("caption", "Tokens left, protected ones included");
  page.open("thead");
  page.open("tr");
  for (const char* name : {"after block", "tokens", "groups of two and more", "largest group", "patches dropped"})
    page.element("th", {{"scope", "col"}, {"class", "n"}}, name);
  page.close();
  page.close();
  page.open("tbody");
  for (const TokenGroups& block : picture.blocks) {
    size_t many = 0, largest = 0, dropped = 0;
    for (const auto& [token, patches] : groups_of(block)) {
      if (token == kDropped) {
        dropped = patches.size();
        continue;
      }
      many += patches.size() > 1;
      largest = std::max(largest, patches.size());
    }
    page.open("tr");
    for (const int64_t value : {block.block, block.tokens, int64_t(many), int64_t(largest), int64_t(dropped)})
      page.element("td", {{"class", "n"}}, std::to_string(value));
    page.close();
  }
  page.close();
  page.close();
}

}  // namespace

std::string to_html(const TokenPicture& picture) {
  Markup page = io::open_page("Tokens of " + picture.path);
  page.element("h1", picture.path);
  page.open("dl");
  const auto fact = [&](const char* name, const std::string& value) {
    page.element("dt", name);
    page.element("dd", value);
  };
  fact("label", picture.label);
  fact("prediction", picture.prediction + ", " + io::percent(picture.probability) +
                         (picture.prediction == picture.label ? "" : " (wrong)"));
  fact("model", picture.model);
  page.close();
  page.open("div", {{"class", "wide"}});
  draw_panels(page, picture);
  page.close();
  page.element("p", {{"class", "dim"}},
               "Computed by the reference path on the CPU in fp32; another device or precision may choose otherwise "
               "between two nearly equal tokens. Blocks are counted from 0.");
  write_table(page, picture);
  return std::move(page).take();
}

}  // namespace pyra::tasks
